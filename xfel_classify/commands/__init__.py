"""One file per verb of ``xfel-classify`` beyond ``run``: parse, call one function, print."""
