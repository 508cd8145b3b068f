"""Explanation methods: each a class with ``attribute(inputs, target)`` and a YAML file in ``conf/method``."""
