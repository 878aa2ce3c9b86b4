"""A package, so that another distribution's top-level `tests` (nfn has one) does not stand in its place in workers."""
