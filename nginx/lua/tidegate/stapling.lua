--- OCSP answers that go out with certificates: fetched ahead of time, never while a client waits.
--
-- Why: a client that asks for one gets what is there, or none; a responder that is slow or away
-- delays nobody. They are in the shared dict under the number of the certificate: `o<number>` the
-- answer, as long as it is valid; `t<number>` when to ask next.

local material = require "tidegate.material"
local ocsp = require "ngx.ocsp"
local posix = require "tidegate.posix"
local ssl = require "ngx.ssl"
local x509 = require "tidegate.x509"

local dict = ngx.shared.tidegate_certificates

local find = string.find
local match = string.match
local max = math.max
local min = math.min
local ngx = ngx
local pcall = pcall
local set_ocsp_status_resp = ocsp.set_ocsp_status_resp
local sub = string.sub
local tcp = ngx.socket.tcp
local timer_at = ngx.timer.at
local tonumber = tonumber

local MAX_RUNNING = 8
local PATIENCE = 60         -- seconds after which a fetch that told nothing is begun anew
local PAUSE = 60           -- seconds after a failed one
local LONGEST = 3600        -- seconds until an answer is asked for again, or half of its validity
local TIMEOUT = 5000        -- ms for connecting, for each write and each read
local MAX_ANSWER = 65536

local _M = {}

local running = 0


--- URL of the responder that a certificate names; nil where it names none, or its issuer is not in
-- the file, without whom nothing can be asked.
function _M.responder(pem)
    local der = ssl.cert_pem_to_der(pem)
    local url = der and ocsp.get_ocsp_responder_from_der_chain(der)
    return url and find(url, "^http://") and url or nil
end


local function address_of(host)
    if find(host, "^%[") or posix.parse_address(host) then
        return host
    end
    local ok, done, address, err = pcall(ngx.run_worker_thread, "tidegate_resolve",
                                         "tidegate.resolve_thread", "address", host)
    if not ok or not done then
        return nil, host .. " cannot be resolved: " .. (not ok and done or address)
    elseif address == "" then
        return nil, host .. ": " .. err
    end
    return address
end


-- The body of the answer to a POST.
local function post(url, body)
    local authority, path = match(url, "^http://([^/]+)(.*)$")
    if not authority then
        return nil, "its URL is not one"
    end
    local host, port = match(authority, "^(.-):(%d+)$")
    host = host or authority
    local address, err = address_of(host)
    if not address then
        return nil, err
    end
    local socket = tcp()
    socket:settimeout(TIMEOUT)
    local ok
    ok, err = socket:connect(address, tonumber(port) or 80)
    if ok then
        ok, err = socket:send({
            "POST ", path == "" and "/" or path, " HTTP/1.0\r\nHost: ", authority,
            "\r\nContent-Type: application/ocsp-request\r\nContent-Length: ", #body,
            "\r\nConnection: close\r\n\r\n", body,
        })
    end
    local answer = ""
    while ok and #answer < MAX_ANSWER do
        local part
        part, err = socket:receiveany(MAX_ANSWER)
        if not part then
            ok = err == "closed"
            break
        end
        answer = answer .. part
    end
    socket:close()
    if not ok then
        return nil, err
    end
    local _, head_end = find(answer, "\r?\n\r?\n")
    if not head_end or not find(answer, "^HTTP/1%.%d 200") then
        return nil, "it answered " .. (match(answer, "^[^\r\n]*") or "nothing")
    end
    return sub(answer, head_end + 1)
end


local function ask(pem, responder)
    local chain = ssl.cert_pem_to_der(pem)
    local question, err = ocsp.create_ocsp_request(chain)
    if not question then
        return nil, err
    end
    local answer
    answer, err = post(responder, question)
    if not answer then
        return nil, err
    end
    local ok
    ok, err = ocsp.validate_ocsp_response(answer, chain)
    if not ok then
        return nil, "its answer is not valid: " .. err
    end
    return answer
end


local function refresh(number, pair, responder)
    local parsed, current = material.parse(pair)
    if not parsed or current ~= number then
        return
    end
    local answer, err = ask(parsed.pem, responder)
    local at, pause = ngx.time(), PAUSE
    if answer then
        local left = (x509.next_update(answer) or at + LONGEST) - at
        dict:safe_set("o" .. number, answer, max(left, 1))
        pause = max(min(left / 2, LONGEST), 1)
    else
        ngx.log(ngx.ERR, "tidegate: OCSP responder ", responder, " of ", pair.paths[1], ": ", err)
    end
    dict:safe_set("t" .. number, at + pause, pause + PATIENCE)
end


local function fetch(premature, number, pair, responder)
    if not premature then
        local ok, err = pcall(refresh, number, pair, responder)
        if not ok then
            ngx.log(ngx.ERR, "tidegate: OCSP: ", err)
        end
    end
    running = running - 1
end


--- Begins to fetch an answer, if there is none or it is getting old.
-- @param number of the certificate, `pair` its material
function _M.look(number, pair, responder, at)
    if running >= MAX_RUNNING or at < (dict:get("t" .. number) or 0) then
        return
    end
    dict:safe_set("t" .. number, at + PATIENCE, PATIENCE)
    if timer_at(0, fetch, number, pair, responder) then
        running = running + 1
    end
end


--- Sends the answer along with the certificate of the current handshake, if there is one.
function _M.staple(number)
    local answer = dict:get("o" .. number)
    if answer then
        local ok, err = set_ocsp_status_resp(answer)
        if not ok then
            ngx.log(ngx.ERR, "tidegate: stapling: ", err)
        end
    end
end


--- Whether there is an answer for a certificate.
function _M.has(number)
    return number ~= nil and dict:get("o" .. number) ~= nil
end


return _M
