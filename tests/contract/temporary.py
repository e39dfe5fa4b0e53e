"""Exemptions of operations that a check is ahead of: operation -> check -> what is missing. Meant to become empty.

Whoever mends an operation deletes its row: an exemption that is not needed fails (`test_exemption_is_needed`).
"""

SPACE = "its maps have two spatial axes so far, or its entry does not say what it looks at"
MEMORY = "it makes memory by new_empty of numbers"
ONE_CHANNEL = "it does not refuse one channel yet"
SUMS = "its sums take in what is not finite at ignored pixels"
OPTIONS = "some of its options are not checked yet"

TEMPORARY: dict[str, dict[str, str]] = {
    "prototype_contrast_loss": {"space": SPACE, "nan_outside": SUMS},
    "class_means": {"space": SPACE, "nan_outside": SUMS, "wrong_options": OPTIONS},
    "class_means[per_image]": {"space": SPACE, "nan_outside": SUMS, "wrong_options": OPTIONS},
    "ClassPrototypes": {"space": SPACE, "subclass": MEMORY, "nan_outside": SUMS},
    "ClassPrototypes[mean]": {"space": SPACE, "subclass": MEMORY, "nan_outside": SUMS},
    "ClassDistributions": {"nan_outside": SUMS},
    "ClassDistributions[momentum]": {"nan_outside": SUMS},
    "fuse_teachers": {"space": SPACE, "one_channel": ONE_CHANNEL},
    "fuse_teachers[max_confidence]": {"space": SPACE, "one_channel": ONE_CHANNEL},
    "fuse_teachers[agreement]": {"space": SPACE, "one_channel": ONE_CHANNEL},
    "teacher_agreement": {"space": SPACE, "one_channel": ONE_CHANNEL},
    "EMATeacher": {"space": SPACE},
    "EMATeacher[ema]": {"space": SPACE},
    "EMATeacher[keep]": {"space": SPACE},
    "FeatureTap": {"space": SPACE},
    "LabelFreeScores": {"space": SPACE, "nan_outside": SUMS},
    "consistency_score": {"wrong_options": OPTIONS},
    "consistency_score[background]": {"wrong_options": OPTIONS},
    "view_consistency": {"space": SPACE, "wrong_options": OPTIONS},
    "mirror_consistency": {"space": SPACE, "wrong_options": OPTIONS},
    "mirror_view": {"space": SPACE, "wrong_options": OPTIONS},
    "shift_view": {"space": SPACE, "wrong_options": OPTIONS},
    "crop_view": {"space": SPACE, "wrong_options": OPTIONS},
    "rotation_view": {"space": SPACE, "wrong_options": OPTIONS},
    "ensemble_agreement": {"wrong_options": OPTIONS},
    "fit_temperature": {"wrong_options": OPTIONS},
}
