"""The side that analyses media."""

import os

# ONNX Runtime's official builds report to Microsoft what they load and run, from 1.29 on also on Linux, unless this is
# set before they are imported (its Privacy.md). Nothing about a user's footage may leave the machine.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
