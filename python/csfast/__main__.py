"""``python -m csfast`` is the command ``csfast``."""

from .cli import main

if __name__ == "__main__":
    main()
