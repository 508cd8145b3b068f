"""The arithmetic of patterns: a layer's statistics, signal estimators, ρ(S), and back-propagation with other weights.

Everything is plain torch, without files, settings or Lightning. README.md in this folder says what each module holds.
"""
