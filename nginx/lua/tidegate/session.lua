--- Keeps a TLS session from being resumed.
--
-- Why: all hosts of a listener share one session cache, and a resumed session brings along that its
-- client was verified, by whichever host's CA. nginx checks the name of resumed sessions only since
-- 1.27.4, and not for clients that send none. A session that is marked here is not found again.

local ffi = require "ffi"
local get_request = require("resty.core.base").get_request
local ssl = require "ngx.ssl"

local C = ffi.C
local ffi_new = ffi.new

pcall(ffi.cdef, "void *ngx_http_lua_ffi_get_req_ssl_pointer(void *r, const char **err);")
pcall(ffi.cdef, "void *SSL_get_session(const void *connection);")
pcall(ffi.cdef, [[int SSL_SESSION_set1_id_context(void *session, const unsigned char *context,
                                                  unsigned int length);]])

-- No listener's sessions have this context, so none is resumed.
local CONTEXT = "tidegate: not to be resumed"

local err_pointer = ffi_new("const char *[1]")

local _M = {}


local function connection()
    if ssl.get_req_ssl_pointer then
        return ssl.get_req_ssl_pointer()
    end
    return C.ngx_http_lua_ffi_get_req_ssl_pointer(get_request(), err_pointer)
end


--- Marks the session of the current handshake.
-- @return true; or nil and why not
function _M.forbid_resumption()
    local pointer, err = connection()
    if pointer == nil then
        return nil, "no TLS connection: " .. (err or "unknown")
    end
    local current = C.SSL_get_session(pointer)
    if current == nil or C.SSL_SESSION_set1_id_context(current, CONTEXT, #CONTEXT) ~= 1 then
        return nil, "the session cannot be kept from being resumed"
    end
    return true
end


return _M
