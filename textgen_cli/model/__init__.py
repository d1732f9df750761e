"""The one loading layer: name -> source -> device -> weights."""

import os

# Read by the libraries when they are imported: nothing is reported to anybody, no service is asked to convert.
for _name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "DISABLE_SAFETENSORS_CONVERSION"):
    os.environ.setdefault(_name, "1")

# Torch's CPU threads wait for one another by spinning. Where other programs want the same cores the one waited for
# does not run, and the spinning takes its time: four to five times the wall time of a short answer on two busy
# cores. So they sleep after a spin that is longer than the time between two products of a small network: being woken
# for each of them costs a token a fifth of its time (docs/results.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "8000")
