"""The paper's experiments on small data: what ``resnet-triton experiment`` does, one concept a file.

nets          the networks that are compared, by kind and depth
plan          what all runs of an experiment have in common
runs          one run: trained, kept, found again
pool          several runs at once
spread        mean and spread over seeds, and when two groups of runs differ
output        the files of an experiment: CSV, PNG, verdict, conditions
degradation   plain against residual nets of growing depth (figure 6)
responses     standard deviations of layer responses (figure 7)
construction  identity blocks appended to a trained net (section 1)
shortcuts     options A, B and C (table 3)
cost          parameters, multiply-adds, latency and memory by depth and width (table 1)
"""
