"""The keras-bn command: what the library does, on files; and the server and its client."""

try:
    from keras_bn_cli.commands import main as main
except KeyboardInterrupt:  # Whoever thinks better of it before the command has begun.
    import sys

    sys.stderr.write("Error: Interrupted.\n")
    sys.exit(130)
