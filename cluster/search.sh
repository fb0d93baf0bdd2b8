#!/bin/bash
# Launches a search in the folder DIR, or resumes the one that is there, on the cluster at ADDRESS.
#
#   cluster/search.sh DIR ADDRESS [RUN_SEARCH OPTIONS OF THE LAUNCH]
#
# So one command serves the first start and every later one. It ends as run_search.py does: with 0
# when the search is done, with 3 when it was interrupted and can go on.
set -u

folder=$1
address=$2
shift 2
if [ -e "$folder/config.yaml" ]; then
    exec python run_search.py --resume "$folder" --set ray.address="$address"
fi
exec python run_search.py --out "$folder" --set ray.address="$address" "$@"
