"""``python -m resnet_triton`` is the ``resnet-triton`` command."""

import sys

from .cli import main

sys.exit(main())
