"""Public models, written small in our own words: what is unusual of each, and as little else as will do.

Two or three layers, 8 to 16 features, a handful of tokens. The right reads are counted by hand in
`tests/conversion/test_public_models.py`; nothing here knows of the library.
"""

from tests.support.public_models import detection, diffusion, language, options, science, sequence, vision
from tests.support.public_models.parts import Example, drawn

EXAMPLES: dict[str, Example] = {
    **diffusion.EXAMPLES,
    **vision.EXAMPLES,
    **detection.EXAMPLES,
    **language.EXAMPLES,
    **options.EXAMPLES,
    **sequence.EXAMPLES,
    **science.EXAMPLES,
}

__all__ = ["EXAMPLES", "drawn"]
