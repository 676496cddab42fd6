import os

# On a CPU torch's threads wait for each other at every operation. Where another process wants the cores, those that
# spin for long, as is the default, keep the core from the one they wait for: tokens took 50 times as long. Set here,
# because OpenMP reads it when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
