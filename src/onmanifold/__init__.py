"""onmanifold: adversarial robustness relative to the data manifold.

The public names are listed once, in ``__init__.pyi``, and imported when they are first used, so that
``onmanifold --help`` answers at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
