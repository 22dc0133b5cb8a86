--- Who may call the admin API and who may read /nginx_status: token and password.
--
-- Why: secrets are compared in one place, in constant time, and nothing else ever sees them. Must
-- not answer: that is `api`'s.

local posix = require "tidegate.posix"

local bit = require "bit"
local bor, bxor = bit.bor, bit.bxor
local byte = string.byte
local gsub = string.gsub
local match = string.match
local ngx = ngx
local now = ngx.now
local type = type

local TOKEN_AGE = 5     -- seconds after which the token's file is read again

local _M = {}

local settings          -- {token, token_file, status_password}
local token_read_at = 0


--- Sets what does not change while a configuration is in force.
-- @param options `{token, token_file, status_password}`; no token and no file: no authentication
function _M.configure(options)
    settings = options
end


-- Reads the token's file again once in a while, so that a new secret needs no restart.
local function expected_token()
    if settings.token_file and now() - token_read_at > TOKEN_AGE then
        token_read_at = now()
        local text = posix.read(settings.token_file)
        text = text and gsub(text, "%s+$", "")
        if text and text ~= "" then
            settings.token = text
        end
    end
    return settings.token
end


-- Compares in a time that depends on the length of what was sent alone.
local function equal(sent, expected)
    local difference = bxor(#sent, #expected)
    for index = 1, #sent do
        difference = bor(difference, bxor(byte(sent, index),
                                          byte(expected, (index - 1) % #expected + 1)))
    end
    return difference == 0
end


-- What follows the name of the scheme in the Authorization header; nil for another scheme.
local function credentials(pattern)
    local header = ngx.req.get_headers()["authorization"]
    return type(header) == "string" and match(header, pattern) or nil
end


--- Whether the request bears the token; all do where there is none.
function _M.authorized()
    local expected = expected_token()
    local sent = expected and credentials("^[Bb]earer +(.+)$")
    return not expected or sent ~= nil and equal(sent, expected)
end


-- The password of HTTP basic authentication, of whatever user; nil where there is none.
local function basic_password()
    local sent = credentials("^[Bb]asic +(.+)$")
    local pair = sent and ngx.decode_base64(sent)
    return pair and match(pair, "^[^:]*:(.*)$")
end


--- Whether the request may read /nginx_status: by the password that is set for it, or the token.
-- @return true; or false, and whether that is for want of both, so that nobody may
function _M.may_read_status()
    local password, token = settings.status_password, expected_token()
    if not password and not token then
        return false, true
    end
    local sent = basic_password()
    return password and sent and equal(sent, password) or token and _M.authorized() or false
end


return _M
