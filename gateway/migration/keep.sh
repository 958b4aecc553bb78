# Keeps the variables of the site, which come by standard input: they may be secrets.
umask 077
cat >/etc/site.env
