"""DICOM files: what is refused and why, stored bits to grey levels, decoding in a process of its own."""
