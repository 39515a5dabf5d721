"""python -m keras_bn_serving.client: the client's command."""

import sys

from keras_bn_serving.client.command import main

sys.exit(main())
