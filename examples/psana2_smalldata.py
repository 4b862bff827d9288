"""A psana2 script with the network's answer beside its other numbers, in psana's own small data.

    python psana2_smalldata.py mfxl1033223 95 --dir /path/to/xtc2
    PS_SRV_NODES=1 mpirun -n 8 python psana2_smalldata.py mfxl1033223 95

Under mpirun psana2 wants a server rank for small data, hence PS_SRV_NODES=1. Ranks that only
serve run this script too; the network is opened by the first image, so they never load it.
"""
import argparse

import psana

from xfel_classify import Classifier

parser = argparse.ArgumentParser()
parser.add_argument("exp")
parser.add_argument("run", type=int)
parser.add_argument("--dir")
parser.add_argument("--detector", default="jungfrau")
parser.add_argument("-o", "--output", default="smalldata.h5")
args = parser.parse_args()

where = {"dir": args.dir} if args.dir else {}
ds = psana.DataSource(exp=args.exp, run=args.run, batch_size=10, **where)
smd = ds.smalldata(filename=args.output, batch_size=10)
classify = Classifier("sfx-hit")
run = next(ds.runs())
detector, ebeam = run.Detector(args.detector), run.Detector("ebeam")
answers = classify.stream(run.events(), detector=detector,
                          photon_energy_eV=lambda event: ebeam.raw.ebeamPhotonEnergy(event))
for event, answer in answers:
    smd.event(event, hit_score=float(answer["hit/score"]), hit_label=int(answer["hit/label"]),
              status=int(answer["status"]))
smd.done()
