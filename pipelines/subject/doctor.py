"""The former name of `pipelines.subject.image_checks`, kept for `python -m pipelines.subject.doctor`."""

from pipelines.subject.image_checks import command

if __name__ == "__main__":
    command()
