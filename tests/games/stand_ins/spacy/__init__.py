"""Nothing of spaCy but the two names that the kind "jericho" asks for when it loads."""

from types import SimpleNamespace

util = SimpleNamespace(is_package=lambda name: True)


def load(name, exclude=()):
    return None
