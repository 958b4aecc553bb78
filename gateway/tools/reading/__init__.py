"""Claude Code's Read: numbered text, images, PDFs, notebooks; texts of version 2.1.331.

Other packages use `read.read`. All of it runs inside workers.
"""
