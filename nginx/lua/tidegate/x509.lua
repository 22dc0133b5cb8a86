--- What a certificate says, and whether a key belongs to it.
--
-- Why: nginx tells such things at a reload and at no other time. Here they are asked of the OpenSSL
-- that nginx runs with, in place; nothing waits. Key material never gets into a message.

local ffi = require "ffi"
local ssl = require "ngx.ssl"

local C = ffi.C
local cast = ffi.cast
local ffi_new = ffi.new
local find = string.find
local gsub = string.gsub
local match = string.match
local parse_pem_cert = ssl.parse_pem_cert
local parse_pem_priv_key = ssl.parse_pem_priv_key
local tonumber = tonumber

pcall(ffi.cdef, "void *OPENSSL_sk_value(const void *stack, int index);")
pcall(ffi.cdef, "int X509_check_private_key(const void *certificate, const void *key);")
pcall(ffi.cdef, [[int X509_check_host(void *certificate, const char *name, size_t length,
                                      unsigned int flags, char **peer_name);]])
pcall(ffi.cdef, "const void *X509_get0_notBefore(const void *certificate);")
pcall(ffi.cdef, "const void *X509_get0_notAfter(const void *certificate);")
pcall(ffi.cdef, "int ASN1_TIME_to_tm(const void *time, void *tm);")
pcall(ffi.cdef, "long timegm(void *tm);")
pcall(ffi.cdef, "void ERR_clear_error(void);")
pcall(ffi.cdef, "void *d2i_OCSP_RESPONSE(void **to, const unsigned char **from, long length);")
pcall(ffi.cdef, "void OCSP_RESPONSE_free(void *response);")
pcall(ffi.cdef, "void *OCSP_response_get1_basic(void *response);")
pcall(ffi.cdef, "void OCSP_BASICRESP_free(void *basic);")
pcall(ffi.cdef, "void *OCSP_resp_get0(void *basic, int index);")
pcall(ffi.cdef, [[int OCSP_single_get0_status(void *single, int *reason, void **revoked,
                                              void **this_update, void **next_update);]])

local tm = ffi_new("char[128]")     -- struct tm, whatever its size

local _M = {}


local function seconds(time)
    if time == nil or C.ASN1_TIME_to_tm(time, tm) ~= 1 then
        return nil
    end
    return tonumber(C.timegm(tm))
end


-- What ngx_lua says is "PEM_read_bio_X509_AUX() failed" and the like; its cause is plainer.
local function unreadable(pem, what)
    C.ERR_clear_error()
    if not find(pem, "%S") then
        return "is empty"
    end
    return "has no " .. what .. " in PEM format that can be read"
end


--- The certificates in `pem`, as ngx.ssl takes them.
-- @return them; or nil and a phrase that says why not
function _M.chain(pem)
    local chain = parse_pem_cert(pem)
    if not chain then
        return nil, unreadable(pem, "certificate")
    end
    C.ERR_clear_error()
    return chain
end


--- The private key in `pem`, as ngx.ssl takes it.
-- @return it; or nil and a phrase that says why not
function _M.key(pem)
    -- OpenSSL would ask for the pass phrase at the terminal.
    if find(pem, "BEGIN ENCRYPTED PRIVATE KEY", 1, true) or find(pem, "4,ENCRYPTED", 1, true) then
        return nil, "is encrypted, and nobody could enter the pass phrase"
    end
    local key = parse_pem_priv_key(pem)
    if not key then
        return nil, unreadable(pem, "private key")
    end
    return key
end


--- Whether `key` belongs to the first certificate of `chain`.
function _M.belongs(chain, key)
    local ok = C.X509_check_private_key(C.OPENSSL_sk_value(chain, 0), key) == 1
    C.ERR_clear_error()
    return ok
end


--- From when to when the first certificate of `chain` is valid, as Unix times.
function _M.validity(chain)
    local leaf = C.OPENSSL_sk_value(chain, 0)
    return seconds(C.X509_get0_notBefore(leaf)) or 0, seconds(C.X509_get0_notAfter(leaf)) or 0
end


--- Whether the first certificate of `chain` is for host `name`, which may begin with `*.`.
function _M.is_for(chain, name)
    local leaf = C.OPENSSL_sk_value(chain, 0)
    local asked = match(name, "^%*%.") and gsub(name, "^%*", "any-name-below", 1) or name
    return C.X509_check_host(leaf, asked, #asked, 0, nil) == 1
end


--- Until when an OCSP answer (DER) is valid, as a Unix time; nil where it does not say.
function _M.next_update(answer)
    local from = ffi_new("const unsigned char *[1]")
    from[0] = cast("const unsigned char *", answer)
    local response = C.d2i_OCSP_RESPONSE(nil, from, #answer)
    local basic = response ~= nil and C.OCSP_response_get1_basic(response) or nil
    local single = basic ~= nil and C.OCSP_resp_get0(basic, 0) or nil
    local time
    if single ~= nil then
        local next_update = ffi_new("void *[1]")
        C.OCSP_single_get0_status(single, nil, nil, nil, next_update)
        time = seconds(next_update[0])
    end
    if basic ~= nil then
        C.OCSP_BASICRESP_free(basic)
    end
    if response ~= nil then
        C.OCSP_RESPONSE_free(response)
    end
    return time
end


return _M
