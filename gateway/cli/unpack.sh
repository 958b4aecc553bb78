# Unpacks what `incus-gateway cp` sends.
#
# Usage:  sh -c "$(cat unpack.sh)" sh TARGET
# Input:  a tar, once the output has said how its entries are named.
# Output: "into" where the copy goes into the folder TARGET, or "as" where it gets TARGET's name.
# Exit:   tar's.
target=$1
word=into folder=$target
if ! [ -d "$target" ]; then
  case $target in
    */) ;;
    *) word=as folder=$(dirname -- "$target") ;;
  esac
fi
mkdir -p -- "$folder" && echo "$word" && exec tar -x -p -o -f - -C "$folder"
