"""Does it help, and when? Many training runs on real photographs, compared: `python -m bench.study --help`."""
