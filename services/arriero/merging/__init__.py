"""Brings weights in and folds adapters into them.

Responsibility: the stages `import` and `merge`. Does not know training,
quantization or serving.
"""
