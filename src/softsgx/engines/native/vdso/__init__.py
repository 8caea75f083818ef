"""The vDSO of the program: its ELF image, its code, the page it shares with the supervisor."""
