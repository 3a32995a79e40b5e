"""What every part of the project needs: command lines, errors, files, the machine, progress, reading ahead."""
