"""What pyproject.toml cannot say: the data that the quickstart reads go into the wheel, inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

EXAMPLES = ("stdlib_grouped.train.jsonl", "stdlib_grouped.test.jsonl")


class BuildWithExamples(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # a checkout has them beside the package
            folder = Path(self.build_lib, "rag_retrieval", "example_data")
            folder.mkdir(parents=True, exist_ok=True)
            for name in (*EXAMPLES, "licenses/PSF-2.0.txt"):
                shutil.copy(Path("example_data", name), folder)


setup(cmdclass={"build_py": BuildWithExamples})
