"""Experiments: not steps of editing a language model, but what a choice of the method rests on.

``crispedit lenet`` compares second-order constraints where exact curvature can be computed (CrispEdit, arXiv
2602.15823, section 4.1). What is cut, and how, is said by the same code as for language models
(:mod:`crispedit.threshold`, :mod:`crispedit.spectrum`, :mod:`crispedit.subspace`).
"""
