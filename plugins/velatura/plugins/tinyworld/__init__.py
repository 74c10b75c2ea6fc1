"""The embedded world: coloured shapes and small portraits of 24 x 24 pixels that a program draws and verifies exactly.

It has what post-training needs: prompts with an honest score, edits with a known answer, and names whose looks a model
can only know by heart. It lets every recipe run end to end in minutes on a CPU.
"""
