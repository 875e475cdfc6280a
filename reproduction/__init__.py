"""The reproduction of the paper: profiles, pipeline, tables, figures and findings. Imports xattn, never the reverse."""

import pandas as pd

from reproduction import clone  # noqa: F401

# Otherwise Jupyter would show text between two dollars in a table, such as a name, as a formula.
pd.set_option("display.html.use_mathjax", False)
