"""All benchmarks, one after the other: ``python -m benchmarks`` from the project's root."""

import os

# Before torch starts its threads: idle ones sleep, which leaves a busy machine its processors.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from benchmarks import attacks, autoattack, fonts, glow, methods, training

if __name__ == "__main__":
    fonts.main()
    attacks.main()
    autoattack.main()
    training.main()
    methods.main()
    glow.main()
