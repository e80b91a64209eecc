"""Arrays in, figures with intervals out: what monitors, probes and classification share.

    estimate      a figure with its interval, bootstrap samples of patients
    ranking       AUC, average precision, partial AUC, sensitivity at a specificity
    delong        variance of AUCs without a bootstrap, paired test
    decisions     accuracy, kappa, F1, sensitivity of given decisions
    calibration   probabilities of logits, temperature, Brier, log loss, ECE
    panel         all figures of a kind of task by their names

Weights are (R, m): how often each of m cases occurs in each of R bootstrap samples. Every metric takes them and gives
(R,) figures at once; `np.ones((1, m))` gives the figure itself. What cannot be computed is nan.
"""

from .estimate import Estimate, Floats, Ints, Kind, patient_bootstrap
from .panel import Metric, bootstrap_scores, chance, estimates, headline, panel, score

__all__ = [
    "Estimate",
    "Floats",
    "Ints",
    "Kind",
    "Metric",
    "bootstrap_scores",
    "chance",
    "estimates",
    "headline",
    "panel",
    "patient_bootstrap",
    "score",
]
