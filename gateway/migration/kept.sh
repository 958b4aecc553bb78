# Names what was kept of an earlier switch, whose paths begin with $1.
ls -d "$1"-* 2>/dev/null || :
