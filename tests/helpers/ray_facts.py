"""An actor that says where it runs; its module imports nothing that takes long."""

import json
import os
import subprocess


class Facts:
    """An actor that loads nothing; the digest of its models are facts about it."""

    def start(self, *arguments):
        """Start a child, and return the facts."""
        import ray  # the driver, which imports this module too, must not

        child = subprocess.Popen(["sleep", "1000"])
        head = ray.get_runtime_context().gcs_address
        facts = {"worker": os.getpid(), "nice": os.nice(0), "child": child.pid}
        return (json.dumps(facts), head), 0
