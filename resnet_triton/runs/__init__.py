"""Training runs: what ``resnet-triton train`` does, one concept a file.

config       what determines a run, and its configuration id
data         the data sets, and which images make up which step
cifar        CIFAR's standard files, read without running code
augment      augmentation of the papers
recipes      named ways to train, and their initialisation
build        a model by name, with as many outputs as the data have classes
schedule     the learning rate of a step
loop         steps, epochs, evaluation; what a checkpoint needs and gives
rng          the states of the random generators
files        file operations that a crash can only fall between
checkpoint   checkpoints that are complete or not there
distributed  the processes of ``torchrun``
interrupt    Ctrl-C and SIGTERM
curves       metrics.csv, TensorBoard, the curves as a picture
"""
