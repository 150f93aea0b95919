"""The steps of `bench/gpu_suite.py`: what one visit to a GPU machine must do."""
