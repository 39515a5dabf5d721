"""`python -m keras_bn_cli`, the command `keras-bn`."""

from keras_bn_cli import main

if __name__ == "__main__":
    main()
