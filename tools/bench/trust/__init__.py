"""What happens to the folders of users when something goes wrong, by one table of commands.

Here: commands in processes of their own, the things they make, faults, and a benchmark for each
kind of fault. Not here: the checks themselves, which stand where a folder is read or written.
"""
