"""Measures of explanations: image degradation, similarity of heat maps, and agreement with a known truth.

Each module has one kind of measure, as functions of tensors. README.md in this folder says how to add one.
"""
