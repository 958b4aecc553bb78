# Some programs have certificates of their own; see system.conf.d.
export NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt
export REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt
export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
# the same as for commands started by the gateway
export PATH="$HOME/.local/bin:$HOME/.local/share/pnpm/bin:$HOME/.bun/bin:$PATH"
