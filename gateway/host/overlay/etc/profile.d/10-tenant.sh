# Bun and Node bring their own certificates: see system.conf.d.
export NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt
export PATH="$HOME/.bun/bin:$PATH"
