from pseuzo.cli import main

main(prog_name="pseuzo")
