"""Training: batch statistics, blocks that keep hardly any activation, and their gradients.

Read top-down: :mod:`.modules` runs a block's modules, :mod:`.functions` differentiates, :mod:`.ops` are the operators,
:mod:`.block` is the arithmetic of a block forward and backward as steps, :mod:`.steps` decides how each step runs, and
:mod:`.reference` says what each step means in plain PyTorch. ``docs/training.md`` derives the formulas.
"""
