# Packs a file or a folder for `incus-gateway cp`.
#
# Usage:  sh -c "$(cat pack.sh)" sh PATH
# Input:  none.
# Output: a tar whose entries begin with ./NAME, the last part of PATH, or with . where a folder is named by . or /.
# Exit:   tar's; 44 where there is no PATH.
path=$1
[ -e "$path" ] || [ -L "$path" ] || exit 44
case $path in
  */ | . | .. | */. | */..) folder=$path name=. ;;
  *) folder=$(dirname -- "$path") name=./$(basename -- "$path") ;;
esac
exec tar -c -f - -C "$folder" -- "$name"
