"""ocrm-ray: RLHF on a Ray cluster with a reward model that is corrected while the policy moves."""

__version__ = "0.1.0"
