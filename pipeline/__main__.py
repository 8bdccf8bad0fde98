"""`python -m pipeline`, and the one file that `ray submit CLUSTER.yaml pipeline/__main__.py -- …` uploads.

On a cluster it runs alone, from the home folder of the head; everything else comes from the installed package.
"""

from pipeline.cli import main

if __name__ == "__main__":
    main()
