"""Fit the probabilities that a linking run gives its answers to gold labels: `gemel calibrate`.

python jobs/calibrate.py linked_dev/ calibration/ --nil-precision 0.8
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("calibrate")
