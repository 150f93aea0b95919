"""Device code and launchers of resnet_triton; see README.md in this folder.

Imported as ``resnet_triton.kernels`` (the top-level name ``kernels`` belongs to another project). Every
module here imports torch and triton only, never resnet_triton; importing this package imports neither.
"""
