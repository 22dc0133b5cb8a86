--- Sessions by a cookie of our own: which peer one belongs to, and the cookie that says so.
--
-- Why: the cookie names the peer by a keyed hash of its id, so it tells nobody an address, no
-- client can make one up, and every worker of every instance that has the same secret reads it the
-- same way, after a restart and in any membership. Nothing is stored.

local codec = require "tidegate.codec"

local byte = string.byte
local concat = table.concat
local encode_base64 = ngx.encode_base64
local find = string.find
local gmatch = string.gmatch
local gsub = string.gsub
local hmac = ngx.hmac_sha1
local ipairs = ipairs
local ngx = ngx
local sub = string.sub
local type = type
local var = ngx.var

local PREFIX = "TIDEGATE_"
local TOKEN_BYTES = 12
local URL_SAFE = { ["+"] = "-", ["/"] = "_" }

local _M = {}

local secret = ""


--- Sets the secret that all instances share.
function _M.configure(text)
    secret = text
end


local function token(name, id)
    return (gsub(encode_base64(sub(hmac(secret, name .. "\0" .. id), 1, TOKEN_BYTES)), "[+/]",
                 URL_SAFE))
end


-- Name of the cookie; by default one that no other upstream has.
local function cookie_name(upstream)
    local name = upstream.policy.sticky.cookie
    if name == "" then
        name = PREFIX .. gsub(sub(hmac("", upstream.name), 1, 6), ".", function(char)
            return ("%02x"):format(byte(char))
        end)
    end
    return name
end


-- The attributes as they follow the value.
local function attributes(sticky)
    local parts = { "; Path=" .. sticky.path }
    if sticky.max_age > 0 then
        parts[#parts + 1] = "; Max-Age=" .. sticky.max_age
    end
    if sticky.secure then
        parts[#parts + 1] = "; Secure"
    end
    if sticky.http_only then
        parts[#parts + 1] = "; HttpOnly"
    end
    if sticky.same_site ~= "" then
        parts[#parts + 1] = "; SameSite=" .. sticky.same_site
    end
    return concat(parts)
end


--- What an opened upstream needs for it. Tokens that the version before knows are not made again.
function _M.new(upstream, before)
    local name = cookie_name(upstream)
    return {
        name = name,
        variable = "cookie_" .. name,
        attributes = attributes(upstream.policy.sticky),
        tokens = {},                            -- id → token
        before = before and before.tokens,
    }
end


local function token_of(upstream, index)
    local session = upstream.session
    local id = codec.id(upstream.blob, upstream.head.count, index)
    local known = session.tokens[id] or session.before and session.before[id]
        or token(upstream.name, id)
    session.tokens[id] = known
    return known
end


-- Token → index of all peers that may have sessions: also those that drain, and those whose weight
-- is 0 so that they take no new ones.
local function build(upstream)
    local indexes = {}
    local head, peers = upstream.head, upstream.peers
    for index = head.count - 1, 0, -1 do
        local peer = peers[index]
        local admitted = index < head.up + head.draining
        if admitted or peer.weight == 0 and peer.state ~= codec.PROBING then
            indexes[token_of(upstream, index)] = index
        end
    end
    upstream.session.before = nil
    upstream.session.indexes = indexes
    return indexes
end


-- The same of all cookies of that name, where the first one is nobody's: clients send one for each
-- path and domain that it was ever set for.
local function find_among(cookies, wanted, indexes)
    for name, value in gmatch(cookies, "([^;=%s]+)=([^;]*)") do
        if name == wanted and indexes[value] then
            return indexes[value]
        end
    end
    return nil
end


--- Index of the peer that the current request's session belongs to; nil where there is none.
function _M.find(upstream)
    local session = upstream.session
    local value = var[session.variable]
    if not value then
        return nil
    end
    local indexes = session.indexes or build(upstream)
    return indexes[value] or find_among(var.http_cookie or "", session.name, indexes)
end


-- The cookies that the response has already, without one of ours.
local function others(name)
    local cookies, rest = ngx.header["Set-Cookie"], {}
    for _, cookie in ipairs(type(cookies) == "table" and cookies or { cookies }) do
        if find(cookie, name .. "=", 1, true) ~= 1 then
            rest[#rest + 1] = cookie
        end
    end
    return rest
end


--- Has the client told that its session belongs to the peer at `index` from now on.
function _M.set(upstream, index)
    local session = upstream.session
    local cookies = others(session.name)
    cookies[#cookies + 1] = session.name .. "=" .. token_of(upstream, index) .. session.attributes
    ngx.header["Set-Cookie"] = cookies
end


--- Takes back what `set` has done: the request is not answered by that peer.
function _M.unset(upstream)
    local cookies = others(upstream.session.name)
    ngx.header["Set-Cookie"] = #cookies > 0 and cookies or nil
end


return _M
