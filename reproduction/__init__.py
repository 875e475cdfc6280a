"""The reproduction of the paper: profiles, pipeline, tables, figures and findings. Imports xattn, never the reverse."""
