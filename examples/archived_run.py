"""Walk through an archived run (HDF5, CXI, NeXus) and stop at what is interesting.

    python archived_run.py run95/*.h5 --constants constants.h5

For a whole run with files as output, `xfel-classify run` is the better choice; this is for a
program that wants to do something of its own with some events.
"""
import argparse

from xfel_classify import Classifier, open_run

parser = argparse.ArgumentParser()
parser.add_argument("files", nargs="+")
parser.add_argument("--constants", help="pedestals, gain and geometry, for raw files")
args = parser.parse_args()

options = {"constants": args.constants} if args.constants else {}
hits = events = unusable = 0
with open_run(args.files, **options) as source, Classifier("sfx-hit") as classify:
    print(f"{source.run.exp} run {source.run.run}: {source.expected_events()} events of "
          f"{source.run.detector} {source.run.panel_shape}")
    for frame, answer in classify.stream(source):
        events += 1
        unusable += answer["status"] != 0
        if answer["hit/label"] == 1:
            hits += 1
            brightest = frame.raw_PSF.max()      # valid until the next event unless you copy it
            print(f"event {frame.index}: score {answer['hit/score']:.4f}, brightest {brightest}")
print(f"{hits} hits in {events} events, {unusable} without a usable image")
